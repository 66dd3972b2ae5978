"""What a written package holds beside its kernels and graphs; copied as it is, so it knows only torch, triton and safetensors."""
