"""Model families: where units live, and how they are removed."""
