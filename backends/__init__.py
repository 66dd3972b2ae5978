"""Built-in backends; they reach the framework through entry points, like a third party's."""
