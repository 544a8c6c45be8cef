"""Contrastive losses: public functions, their meaning, one implementation a platform."""
