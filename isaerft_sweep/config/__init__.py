"""Turns Hydra's composed config into frozen, checked specs; no other package imports Hydra or OmegaConf."""
