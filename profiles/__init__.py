"""Device profiles: one TOML file a device."""
