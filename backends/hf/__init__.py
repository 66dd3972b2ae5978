"""A plan as a Hugging Face directory, which transformers loads by itself."""
