"""Turns pairs into text by the chat template, and into token ids."""
