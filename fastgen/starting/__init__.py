"""What a first recipe is made from: those that ship, and `fastgen new`, which writes one for a pipeline."""
