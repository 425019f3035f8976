"""Networks for one modality: encoder, projection to the shared space, head."""
