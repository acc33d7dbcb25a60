"""What a run leaves on storage: whole files, commit records, manifests."""
