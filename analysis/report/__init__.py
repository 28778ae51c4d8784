"""Tables, sentences, figures and HTML pages."""
