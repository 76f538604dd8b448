"""The wire: messages, phases, transcript. Pure."""
