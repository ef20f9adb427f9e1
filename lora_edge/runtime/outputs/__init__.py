"""What goes into and comes out of graphs without a cache: images, labels, embeddings."""
