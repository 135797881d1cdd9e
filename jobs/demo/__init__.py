"""The demo on real data: a small model, three LoRA adapters trained on it, their merge and what each answers."""
