"""The ServerApp of the installed Wardround."""

from server import app as installed

app = installed.app
