"""Shows what a run would be trained on, stage by stage, as text or a web page."""
