"""From Hydra's composed config to frozen, checked specs; nothing further in knows Hydra or OmegaConf."""
