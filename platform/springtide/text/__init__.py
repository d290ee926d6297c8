"""BERT-family encoder: the catalogue in bulk, a query online."""
