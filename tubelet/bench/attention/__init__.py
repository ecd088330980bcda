"""Attention at the sizes of video diffusion transformers: kernels, policies, whole models."""
