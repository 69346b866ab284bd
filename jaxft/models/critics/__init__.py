"""Critics: networks that judge pictures and are not exported."""
