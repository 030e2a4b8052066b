"""Who and what there is: firms, sites, machines, signals; keys and how they are had; quotas; the audit trail."""
