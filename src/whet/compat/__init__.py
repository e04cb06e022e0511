"""Adapters that a user asks for by name: other libraries' names, for one process, without changing those libraries."""
