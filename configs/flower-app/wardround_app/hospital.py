"""The ClientApp of the installed Wardround."""

from client import app as installed

app = installed.app
