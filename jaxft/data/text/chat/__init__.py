"""Conversations as token rows: records, the chat template, trained spans, rows."""
