"""What the documents, headers and drawings say is there, is there."""
