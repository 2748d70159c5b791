"""Subjects over HTTP: the API, the page, and runs started from it."""
