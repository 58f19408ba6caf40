"""Simulated engines that are true to life: they render templates, and keep and reuse prompts, as real ones do."""
