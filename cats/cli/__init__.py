"""The command-line room: flags, printing, exit statuses. Every command uses it; nothing in the library imports it."""
