"""Weights alone: `tim.app.demo` draws with them."""
