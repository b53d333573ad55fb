"""Sharing: zoos of stores, and stores, models and zoos on the Hugging Face hub."""
