"""What tests share: models, adapters, graphs and commands, made small and made once."""
