-- The tables of the mailer. They live in a schema of their own beside streamworker's ledger, in one database: only so can
-- a handler's rows and "this job is done" commit together.

create schema if not exists mailer;

-- Bytes, each stored once: raw messages, bodies, attachments. In chunks, so that nobody ever holds 50 MB in memory.
create table mailer.email_content (
    id uuid primary key default gen_random_uuid(),
    sha256 bytea not null unique check (length(sha256) = 32),
    size bigint not null,
    created_at timestamptz not null default now()
);

create table mailer.email_content_chunks (
    content_id uuid not null references mailer.email_content on delete cascade,
    n integer not null,
    data bytea not null,
    primary key (content_id, n)
);
-- Mail is mostly base64, pictures and archives: compressing it again costs time and saves nothing.
alter table mailer.email_content_chunks alter column data set storage external;

-- Incoming messages. A message is known by its bytes: Message-ID is the sender's claim, and two different messages may carry
-- the same one.
create table mailer.email_messages (
    id uuid primary key default gen_random_uuid(),
    mailbox text not null,
    raw_content_id uuid not null references mailer.email_content,
    message_id text,
    in_reply_to text,
    subject text not null,
    sender text not null,
    recipients text[] not null,
    sent_at timestamptz,
    body_text text,
    body_html text,
    spam boolean not null default false,
    defects text[] not null,
    received_at timestamptz not null default now(),
    unique (mailbox, raw_content_id)
);
create index on mailer.email_messages (message_id);

create table mailer.email_attachments (
    message_id uuid not null references mailer.email_messages on delete cascade,
    n integer not null,
    content_id uuid not null references mailer.email_content,
    media_type text not null,
    filename text,
    primary key (message_id, n)
);

create table mailer.email_templates (
    id uuid primary key default gen_random_uuid(),
    name text not null unique,
    subject text not null,
    body_text text not null,
    body_html text,
    updated_at timestamptz not null default now()
);

create table mailer.campaigns (
    id uuid primary key default gen_random_uuid(),
    name text not null unique,
    template_id uuid not null references mailer.email_templates,
    sender text not null,
    recipients integer not null default 0,
    created_at timestamptz not null default now()
);

-- A mailbox that is made known to providers by mail that grows from day to day; the seeds are mailboxes of ours elsewhere.
create table mailer.warmup_configs (
    id uuid primary key default gen_random_uuid(),
    mailbox text not null unique,
    seeds text[] not null check (cardinality(seeds) > 0),
    template_id uuid not null references mailer.email_templates,
    reply_template_id uuid not null references mailer.email_templates,
    first_day integer not null default 5 check (first_day > 0),
    growth real not null default 1.5 check (growth >= 1),
    most_per_day integer not null default 200,
    reply_share real not null default 0.3 check (reply_share between 0 and 1),
    days integer not null default 30,
    active boolean not null default true
);

-- One row per step that was taken: what makes a step that runs twice take effect once.
create table mailer.warmup_steps (
    warmup_id uuid not null references mailer.warmup_configs on delete cascade,
    day integer not null,
    step text not null check (step in ('outbound', 'inbound', 'engagement')),
    mails integer not null,
    spam integer not null default 0,
    at timestamptz not null default now(),
    primary key (warmup_id, day, step)
);

-- One mail to one recipient.
--   queued    nothing was tried, or what was tried was refused for now (deferred)
--   sending   job_id talks to the server, or died doing so: whether the server has the mail is unknown until it says so
--   sent      the server said 250           failed      it said 5xx, or the job gave up
--   bounced   it was sent, and came back    suppressed  nobody talked to a server
create table mailer.email_deliveries (
    id uuid primary key default gen_random_uuid(),
    campaign_id uuid references mailer.campaigns,
    warmup_id uuid references mailer.warmup_configs,
    warmup_day integer,
    template_id uuid not null references mailer.email_templates,
    sender text not null,
    recipient text not null,
    variables jsonb not null default '{}',
    message_id text not null unique,
    in_reply_to text,
    status text not null default 'queued'
        check (status in ('queued', 'deferred', 'sending', 'sent', 'failed', 'bounced', 'suppressed')),
    job_id text,
    attempts integer not null default 0,
    -- Attempts whose end nobody knows: the mail may have arrived once more for each of them.
    uncertain integer not null default 0,
    soft_bounces integer not null default 0,
    reply text,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    unique (campaign_id, recipient)
);
create index on mailer.email_deliveries (warmup_id, warmup_day) where warmup_id is not null;

-- Never mailed again. Addresses are in lower case.
create table mailer.suppressions (
    address text primary key check (address = lower(address)),
    reason text not null,
    created_at timestamptz not null default now()
);

-- What happened to deliveries, append-only. `source` tells events of one type apart (which bounce message), so that
-- whoever records an event twice adds nothing.
create table mailer.email_events (
    id bigint generated always as identity primary key,
    xid xid8 not null default pg_current_xact_id(),
    delivery_id uuid not null references mailer.email_deliveries on delete cascade,
    campaign_id uuid references mailer.campaigns,
    type text not null check (type in ('sent', 'failed', 'suppressed', 'hard_bounce', 'soft_bounce')),
    source text not null default '',
    at timestamptz not null default now(),
    unique (delivery_id, type, source)
);
create index on mailer.email_events (xid);

create table mailer.campaign_metrics (
    campaign_id uuid not null references mailer.campaigns on delete cascade,
    day date not null,
    sent bigint not null default 0,
    failed bigint not null default 0,
    suppressed bigint not null default 0,
    hard_bounces bigint not null default 0,
    soft_bounces bigint not null default 0,
    primary key (campaign_id, day)
);

-- How far the metrics have come: events of transactions below `xid` are counted.
create table mailer.analytics_progress (
    only_row boolean primary key default true check (only_row),
    xid xid8 not null default '0',
    counted bigint not null default 0,
    at timestamptz not null default now()
);
insert into mailer.analytics_progress default values;

create table mailer.webhooks (
    id uuid primary key default gen_random_uuid(),
    url text not null,
    -- The receiver's key for the signatures, as Standard Webhooks writes it: whsec_ and base64.
    secret text not null check (secret like 'whsec\_%'),
    events text[] not null,
    active boolean not null default true,
    disabled_because text
);

create table mailer.webhook_deliveries (
    id uuid primary key default gen_random_uuid(),
    webhook_id uuid not null references mailer.webhooks on delete cascade,
    event_id bigint not null references mailer.email_events on delete cascade,
    -- The very bytes that are signed and sent, the same at each attempt.
    body text not null,
    status text not null default 'waiting' check (status in ('waiting', 'delivered', 'failed')),
    attempts integer not null default 0,
    last_answer text,
    updated_at timestamptz not null default now(),
    unique (webhook_id, event_id)
);
