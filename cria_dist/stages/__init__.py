"""The stages as plain classes and functions; who calls them where is decided above."""
