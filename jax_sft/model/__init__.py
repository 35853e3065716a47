"""The model room: what a config says (config), its parts (layers, attention), and the whole (decoder)."""
