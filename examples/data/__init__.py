"""The example pairs, installed as `splaser_plugin.example_data` for `splaser demo`."""
