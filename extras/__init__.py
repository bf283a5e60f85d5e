"""What SPA is compared with and measured by. A stage imports a module of these only in the branch that needs it."""
