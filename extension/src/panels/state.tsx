// Which notebook and server this is, and the faces of what is wrong or comes next.
import * as React from 'react';
import type { Button, Deed, Face } from '../faces';
import { faces } from '../faces';
import { currentSession, where } from '../model';
import type { PartProps } from './parts';
import { Progress, can } from './parts';

export function State(
  props: PartProps & { readonly ask: (what: 'connect' | 'launch') => void }
): React.ReactElement {
  const { trans, view } = props;
  const snapshot = view.snapshot;
  const session = currentSession(snapshot);
  const model = snapshot?.model;
  const busy = snapshot?.busy;
  const [dismissed, setDismissed] = React.useState('');
  return (
    <>
      <dl className="jp-Djinn-facts">
        <dt>{trans.__('notebook')}</dt>
        <dd>{view.notebook || trans.__('none')}</dd>
        {snapshot?.address && (
          <>
            <dt>{trans.__('server')}</dt>
            <dd className="jp-Djinn-server">
              <span className="jp-Djinn-address" title={snapshot.address}>
                {shortAddress(snapshot.address)}
              </span>{' '}
              <span>· {connectionText(props)}</span>
            </dd>
          </>
        )}
        {model && (
          <>
            <dt>{trans.__('model')}</dt>
            <dd>
              {[
                model.name,
                trans._n('%1 layer', '%1 layers', model.num_layers),
                model.dtype,
                model.device,
                ...(model.random_weights ? [trans.__('random weights')] : [])
              ].join(' · ')}
            </dd>
          </>
        )}
      </dl>
      {session && (
        <p
          className={`jp-Djinn-where jp-mod-${session.status}`}
          data-status={session.status}
        >
          {session.id}: {where(session, trans)}
        </p>
      )}
      {busy && (
        <div className="jp-Djinn-busy">
          <span>
            {[busy.text, ...(busy.progress ? [busy.progress.text] : [])].join(
              ' · '
            )}
          </span>
          <Progress
            done={busy.progress?.done ?? null}
            label={busy.progress?.text ?? busy.text}
          />
        </div>
      )}
      {faces(view, trans)
        .filter(face => face.text !== dismissed)
        .map(face => (
          <FaceView
            key={face.code}
            {...props}
            face={face}
            dismiss={() => setDismissed(face.text)}
          />
        ))}
    </>
  );
}

/** Of a Unix socket its file's name; the whole address is in the tooltip. */
function shortAddress(address: string): string {
  return address.startsWith('unix:')
    ? `unix:…/${address.split('/').pop()}`
    : address;
}

function connectionText(props: PartProps): string {
  const { trans, view } = props;
  switch (view.snapshot?.connection) {
    case 'ready':
      return trans.__('connected');
    case 'connecting':
      return trans.__('connecting');
    case 'loading':
      return trans.__('loading its model');
    case 'lost':
      return trans.__('lost');
    case 'denied':
      return trans.__('access refused');
    default:
      return trans.__('not connected');
  }
}

function FaceView(
  props: PartProps & {
    readonly face: Face;
    readonly dismiss: () => void;
    readonly ask: (what: 'connect' | 'launch') => void;
  }
): React.ReactElement {
  const { face, commands, trans, view } = props;
  const run = (deed: Deed) => {
    if ('verb' in deed) {
      void props.perform(deed.verb);
    } else if ('command' in deed) {
      void commands.execute(deed.command);
    } else if ('ask' in deed) {
      props.ask(deed.ask);
    } else {
      props.dismiss();
    }
  };
  const isPossible = (button: Button) =>
    !('verb' in button.deed) ||
    button.deed.verb === 'look' ||
    can(view, button.deed.verb);
  const kind: Record<Face['level'], string> = {
    error: trans.__('error'),
    warning: trans.__('warning'),
    info: trans.__('note')
  };
  return (
    <div
      className={`jp-Djinn-face jp-mod-${face.level}`}
      role={face.level === 'info' ? 'note' : 'alert'}
      aria-label={face.level === 'info' ? kind.info : undefined}
      data-code={face.code}
    >
      {face.level !== 'info' && (
        <span className="jp-Djinn-level">{kind[face.level]}</span>
      )}
      <p className="jp-Djinn-text">{face.text}</p>
      <p className="jp-Djinn-advice">{face.advice}</p>
      {face.progress !== undefined && (
        <Progress done={face.progress} label={face.text} />
      )}
      {face.buttons.length > 0 && (
        <div className="jp-Djinn-buttons">
          {face.buttons.map(button => (
            <button
              key={button.label}
              type="button"
              className="jp-Djinn-button"
              disabled={!isPossible(button)}
              onClick={() => run(button.deed)}
            >
              {button.label}
            </button>
          ))}
        </div>
      )}
    </div>
  );
}
