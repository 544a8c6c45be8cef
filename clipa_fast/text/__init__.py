"""Captions to tokens: WordPiece, and the ways to keep few of a caption's pieces."""
