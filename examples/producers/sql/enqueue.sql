-- psql "$DATABASE_URL" -v ON_ERROR_STOP=1 -v count=10 -f enqueue.sql
-- A row and its job, in one transaction: both are stored, or neither.
create table if not exists orders (id text primary key);

begin;
insert into orders select 'psql-' || n from generate_series(0, :count - 1) as n;
select streamworker.enqueue('email.send', jsonb_build_object('to', 'psql-' || n || '@example.com'), 'email-sending')
  from generate_series(0, :count - 1) as n;
commit;

-- Rolled back: no row, no job.
begin;
insert into orders values ('psql-never');
select streamworker.enqueue('email.send', '{"to": "never@example.com"}', 'email-sending');
rollback;
