"""Why a case failed: experiments, the site that differs, a repair, a reproduction."""
