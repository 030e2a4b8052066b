-- How a machine's figures are made. Rows are added, never changed: a figure names the revision that it used.
CREATE TABLE kpi_setting (
    machine_id bigint NOT NULL REFERENCES machine,
    revision int NOT NULL,
    settings jsonb NOT NULL,
    changed timestamptz NOT NULL DEFAULT now(),
    changed_by bigint NOT NULL,
    PRIMARY KEY (machine_id, revision)
);

-- What a kWh costs at a site, or in a region where the site has no tariff of its own. Of two rows for the same day the newer counts.
CREATE TABLE tariff (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    site_id bigint REFERENCES site,
    region text,
    valid_from date NOT NULL,
    rates jsonb NOT NULL,
    source text NOT NULL,
    confirmed_by text,
    created timestamptz NOT NULL DEFAULT now(),
    created_by bigint NOT NULL,
    CONSTRAINT tariff_scope_check CHECK ((site_id IS NULL) <> (region IS NULL))
);
CREATE INDEX tariff_site_id_idx ON tariff (site_id, valid_from, id) WHERE site_id IS NOT NULL;
CREATE INDEX tariff_region_idx ON tariff (region, valid_from, id) WHERE region IS NOT NULL;

-- kgCO2e for a kWh of electricity from the grid, without the losses of its transmission. 'UK': the government's factor for
-- reporting, for all of the United Kingdom. 'Great Britain' and 'Northern Ireland': the two grids, each with its own mix.
CREATE TABLE carbon_factor (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    region text NOT NULL CHECK (region IN ('UK', 'Great Britain', 'Northern Ireland')),
    year int NOT NULL CHECK (year BETWEEN 1990 AND 2100),
    kg_per_kwh numeric(9, 6) NOT NULL CHECK (kg_per_kwh >= 0 AND kg_per_kwh < 5),
    source text NOT NULL,
    sure text NOT NULL CHECK (sure IN ('seen', 'seen_secondary', 'memory')),
    confirmed_by text,
    created timestamptz NOT NULL DEFAULT now(),
    created_by bigint NOT NULL
);
CREATE INDEX carbon_factor_region_idx ON carbon_factor (region, year, id);

INSERT INTO carbon_factor (region, year, kg_per_kwh, source, sure, confirmed_by, created_by)
SELECT 'UK', year, kg_per_kwh,
       'UK Government GHG conversion factors for company reporting, ' || year || ', UK electricity, scope 2 generation',
       sure, NULL, 0
FROM (VALUES
    (2019, 0.25560, 'memory'),
    (2020, 0.23314, 'memory'),
    (2021, 0.21233, 'memory'),
    (2022, 0.19338, 'memory'),
    (2023, 0.20707, 'memory'),
    (2024, 0.20705, 'seen_secondary'),
    (2025, 0.17700, 'seen_secondary')
) AS known (year, kg_per_kwh, sure);
