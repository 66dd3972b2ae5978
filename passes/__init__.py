"""Built-in passes; they reach the framework through entry points, like a third party's."""
