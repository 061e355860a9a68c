{{- define "lagwise.natsPodSpec" -}}
{{- $nats := .Values.nats -}}
serviceAccountName: {{ include "lagwise.objectName" (dict "root" . "role" "nats") }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: 60
securityContext:
  {{- include "lagwise.podSecurity" . | nindent 2 }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- include "lagwise.placement" $nats }}
containers:
  - name: nats
    image: {{ if $nats.image.digest }}{{ $nats.image.repository }}@{{ $nats.image.digest }}{{ else }}{{ $nats.image.repository }}:{{ $nats.image.tag }}{{ end }}
    imagePullPolicy: {{ $nats.image.pullPolicy }}
    securityContext:
      {{- include "lagwise.containerSecurity" . | nindent 6 }}
    command: [nats-server]
    args: [--config, /etc/nats/nats.conf]
    env:
      - name: POD_NAME
        valueFrom:
          fieldRef:
            apiVersion: v1
            fieldPath: metadata.name
      {{- $secret := include "lagwise.authSecret" . }}
      {{- range include "lagwise.accounts" . | splitList " " }}
      - name: NATS_PASSWORD_{{ upper . }}
        valueFrom:
          secretKeyRef:
            name: {{ $secret }}
            key: {{ . }}
      {{- end }}
      {{- with $nats.extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    ports:
      - name: client
        containerPort: 4222
        protocol: TCP
      - name: monitor
        containerPort: 8222
        protocol: TCP
    # startup: streams are recovered; readiness: clients are served; liveness: JetStream is up.
    startupProbe:
      httpGet:
        path: /healthz
        port: monitor
      periodSeconds: 5
      timeoutSeconds: 5
      failureThreshold: 120
    readinessProbe:
      httpGet:
        path: /healthz?js-server-only=true
        port: monitor
      periodSeconds: 5
      timeoutSeconds: 5
      failureThreshold: 2
    livenessProbe:
      httpGet:
        path: /healthz?js-enabled-only=true
        port: monitor
      periodSeconds: 10
      timeoutSeconds: 5
      failureThreshold: 6
    resources:
      {{- $nats.resources | toYaml | nindent 6 }}
    volumeMounts:
      - name: config
        mountPath: /etc/nats
        readOnly: true
      - name: jetstream
        mountPath: /data
      {{- if $nats.tls.secretName }}
      - name: tls
        mountPath: /etc/nats-tls
        readOnly: true
      {{- end }}
      {{- with $nats.extraVolumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
volumes:
  - name: config
    configMap:
      name: {{ include "lagwise.objectName" (dict "root" . "role" "nats") }}
  {{- with $nats.tls.secretName }}
  - name: tls
    secret:
      secretName: {{ . }}
      defaultMode: 0440
  {{- end }}
  {{- with $nats.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}
