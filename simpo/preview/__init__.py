"""What a run would be trained on, at every stage, as text or a web page."""
