"""The documentation as a site (``./dev docs``): what mkdocs needs beside the Markdown files of the repository."""
