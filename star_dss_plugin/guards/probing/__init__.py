"""Learn most scores of a verdict guard from its states along a response, and ask for the rest."""
