"""What a written package holds beside its kernels and graphs; copied, so it knows only torch, triton, safetensors and the
kernels."""
