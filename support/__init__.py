"""What nobody has to read to understand SPA: other people's models and templates, and what makes a run safe."""
