"""Tables, sentences, figures and pages."""
