"""Disk images: made from a recipe by mmdebstrap and mke2fs, kept by digest."""
