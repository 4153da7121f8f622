"""Adapters to training tools, installed as `splaser_plugin.integrations`."""
