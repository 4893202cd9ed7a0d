"""The cluster: documents, placement, attachments, supervision, REST."""
