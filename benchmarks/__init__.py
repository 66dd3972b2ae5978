"""Each table in the documents, as a command."""
