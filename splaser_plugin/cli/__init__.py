"""The command line: options from the configuration classes, what is drawn in a terminal, and the demo."""
