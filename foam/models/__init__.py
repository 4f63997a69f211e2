"""The language model that FOAM ships, and under `foam.models.training` how it was made."""
